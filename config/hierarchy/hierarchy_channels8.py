# An option of the hierarchy: every latent block has 8 channels, each with an attention and an MLP.
# python train.py config/hierarchy.py config/hierarchy/hierarchy_channels8.py
channels = 8
