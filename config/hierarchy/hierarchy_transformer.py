# An option of the hierarchy: groups are compressed by two causal blocks inside of them.
# python train.py config/hierarchy.py config/hierarchy/hierarchy_transformer.py
compression = 'transformer'
