"""What a guided teacher makes, as shards: its samples, and its walks to them at a student's times.

A folder holds ``plan.json`` (everything that its arrays depend on), ``null.npz`` (the empty prompt, encoded)
and plain tars ``synthetic-00000.tar`` and so on in WebDataset's layout. Of each sample:

===================  ==============================================================================
``KEY.txt``          its caption
``KEY.json``         seed, guidance, teacher, fingerprint of its weights, times of the states
``KEY.states.npy``   float16 ``[S + 1, C, H, W]``: the walk from noise to latents; or the latents
                     alone, ``[1, C, H, W]``, where no walk was asked for
``KEY.context.npy``  float16 ``[L, D]``: the caption, by every text encoder that the teacher has
``KEY.pooled.npy``   float16 ``[P]``
``KEY.png``          the picture, where asked for: the shards then are a data set of pictures too
===================  ==============================================================================

The noise is kept with a walk, though its seed would do: a fifth more bytes at four steps, and the walk stays
whole when numpy changes the stream of its generator, which it may.
"""
