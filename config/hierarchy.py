# The hierarchical transformer in its authors' example: 16 groups of 48 tokens, two levels, 16 latent blocks.
# python train.py config/hierarchy.py
model = 'hierarchy'
block_size = 768
groups = 16
latents = '16-2'
widths = '64-128-256'
n_embd = 256
n_layer = 16
n_head = 8
