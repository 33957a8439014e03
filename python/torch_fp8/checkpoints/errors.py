"""What is wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A file of a checkpoint is not what it should be. The message names the file, and the tensor if there is one."""

    def __init__(self, where: object, what: str) -> None:
        super().__init__(f"torch_fp8: {where}: {what}")
