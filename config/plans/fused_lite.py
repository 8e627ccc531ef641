# FusedKV-Lite (arXiv:2512.03870): the upper half reads layer 0's values and the middle layer's keys.
# python train.py config/plans/fused_lite.py
attention = 'fused_lite(2)'
