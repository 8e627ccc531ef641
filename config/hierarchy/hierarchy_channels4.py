# An option of the hierarchy: every latent block has 4 channels, each with an attention and an MLP.
# python train.py config/hierarchy.py config/hierarchy/hierarchy_channels4.py
channels = 4
