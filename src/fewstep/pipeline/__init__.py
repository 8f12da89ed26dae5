"""From a prompt to an image: models, parameters, the generation loop and file names."""
