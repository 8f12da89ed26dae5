"""Samples of a guided teacher as shards, with its trajectories at the times of a student's grid.

A folder holds ``plan.json`` (everything that its arrays depend on), ``null.npz`` (the empty prompt, encoded)
and uncompressed tars ``synthetic-00000.tar`` and so on in WebDataset's layout. Of each sample:

===================  ==============================================================================
``KEY.txt``          its caption
``KEY.json``         seed, guidance, teacher, fingerprint of its weights, times of the states
``KEY.states.npy``   float16 ``[S + 1, C, H, W]``: the trajectory from noise to latents; or
                     the latents alone, ``[1, C, H, W]``, if no trajectory was asked for
``KEY.context.npy``  float16 ``[L, D]``: the caption, by every text encoder that the teacher has
``KEY.pooled.npy``   float16 ``[P]``
``KEY.png``          the image, if asked for; the shards then are an image data set, too
===================  ==============================================================================

The noise is stored with a trajectory, although its seed would do. It adds a fifth to the size at four steps,
and the trajectory stays valid if NumPy changes the stream of its generator.
"""
