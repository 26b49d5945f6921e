"""bitsandbytes' AdamW in 8 bits, without its wait for the whole device after every tensor."""

import torch

try:
    from bitsandbytes.optim import AdamW8bit as LibraryAdamW8bit
except ImportError as error:
    from configs.errors import InputError

    raise InputError(
        f"train.optimizer adamw8bit needs bitsandbytes ({error}). Install it, or set train.optimizer=adamw."
    ) from error


class AdamW8bit(LibraryAdamW8bit):
    """The library's step waits 836 times in an update of a LoRA on FLUX.1, which only state in paged memory needs: all
    kernels are in one stream, in order."""

    initialized: bool

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        if not self.initialized:
            self.check_overrides()
            self.to_gpu()
            self.initialized = True
        for number, group in enumerate(self.param_groups):
            for place, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if not self.state[parameter]:
                    self.init_state(group, parameter, number, place)
                self.update_step(group, parameter, number, place)
