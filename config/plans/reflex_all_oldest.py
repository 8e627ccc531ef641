# reflex_all with the oldest layer first: only the order of heads differs, so it must tie: a control.
# python train.py config/plans/reflex_all_oldest.py
attention = 'reflex_all_oldest'
