# LIMe's static router (Gerasimov et al., 2025): learned mixes of all earlier layers' keys and values.
# python train.py config/plans/lime.py
attention = 'lime'
