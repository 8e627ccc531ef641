# Mixture-of-depths attention (Zhu et al., 2026): one softmax over tokens and, at each token, earlier layers.
# python train.py config/plans/moda.py
attention = 'moda'
