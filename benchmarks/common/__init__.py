"""What several chapters share: timing, the machine, named shapes, eager RLS, images, training."""
