# An option of the hierarchy: DenseFormer (Pagliardini et al., 2024) in the latent stack.
# python train.py config/hierarchy.py config/hierarchy/hierarchy_dense.py
dense = True
