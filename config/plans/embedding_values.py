# Half of the heads have values that are projected from the token's embedding, in every layer.
# python train.py config/plans/embedding_values.py
attention = 'vanilla embedding_values(4)*5'
