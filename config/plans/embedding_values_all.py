# All values above layer 0 are projected from the token's embedding: the cache is keys, and the tokens' ids.
# python train.py config/plans/embedding_values_all.py
attention = 'vanilla embedding_values(8)*5'
