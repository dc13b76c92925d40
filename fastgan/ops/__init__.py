from fastgan.ops.patch_loss import PatchLoss, patch_loss

__all__ = ["PatchLoss", "patch_loss"]
