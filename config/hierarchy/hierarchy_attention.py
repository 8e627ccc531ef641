# An option of the hierarchy: what was brought back to a length is attended to inside the group.
# python train.py config/hierarchy.py config/hierarchy/hierarchy_attention.py
upsample = 'attention'
