# A base of today, to put before any arm: RMSNorm, rotary positions, QK norm, squared ReLU, soft-capped
# logits, Muon.
# python train.py config/base_modern.py config/skip_v1.py
norm = 'rmsnorm'
position = 'rotary'
qk_norm = True
mlp = 'relu2'
softcap = 15.0
optimizer = 'muon'
