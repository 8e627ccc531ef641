# Six own heads; two read keys and values of layer 0.
# python train.py config/plans/first_62.py
attention = 'layer0(6-2)'
