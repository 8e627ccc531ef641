# The hierarchical transformer at about the parameters of vanilla in size_cpu: groups of 16 tokens.
# python train.py config/hierarchy/hierarchy_cpu.py config/sizes/size_cpu.py --dataset=stdlib
model = 'hierarchy'
block_size = 256
groups = 16
latents = '4'
widths = '64-128'
global_blocks = '0-1'  # none over all tokens, which would be half of the time at a length of 2048
n_embd = 128
n_layer = 4
position = 'rotary'  # learned positions keep it at the loss of token frequencies for hundreds of steps
