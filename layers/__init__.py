"""What attention layers are made of: head plans, additive attention, the loss."""
