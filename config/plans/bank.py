# Bank of Values (He et al., 2026): values of the last third of the layers are rows of a table, one per token.
# python train.py config/plans/bank.py
attention = 'vanilla*4 bank*2'
