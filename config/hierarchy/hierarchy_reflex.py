# An option of the hierarchy: reflex attention in the latent stack.
# python train.py config/hierarchy.py config/hierarchy/hierarchy_reflex.py
attention = 'reflex(4-2-2)'
