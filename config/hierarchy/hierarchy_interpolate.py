# An option of the hierarchy: the encoder joins the decoder with learned shares.
# python train.py config/hierarchy.py config/hierarchy/hierarchy_interpolate.py
skip = 'interpolate'
