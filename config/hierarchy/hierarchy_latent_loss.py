# An option of the hierarchy: the latent stack also learns to predict the next latent.
# python train.py config/hierarchy.py config/hierarchy/hierarchy_latent_loss.py
latent_loss = 0.1
