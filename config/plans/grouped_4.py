# Grouped-query attention: 4 sets of keys and values for 8 heads, half of vanilla's cache.
# python train.py config/plans/grouped_4.py
attention = 'grouped(4)'
