# SVFormer (Zhou et al., 2024): own keys; all values are those of layer 0.
# python train.py config/plans/svformer.py
attention = 'layer0(8/0-8)'
