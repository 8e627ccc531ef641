# A head split that training allocates: each head learns its shares of the earlier layers.
# python train.py config/plans/learned_split.py
attention = 'learned_split'
