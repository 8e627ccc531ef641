# The baseline at the published size (experiment 4). The published settings are train.py's defaults.
# python train.py config/vanilla.py
attention = 'vanilla'
