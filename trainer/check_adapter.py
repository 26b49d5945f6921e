"""Whether the adapter at `method.init_from` can go on: exit code 0, or 2 with all that keeps it from that.

python -m trainer.check_adapter CONFIG.yaml [KEY=VALUE ...]

For `fluxfill check`, which imports no torch. Reads the adapter, and no weights of the base. What is wrong is on
standard output: libraries warn on standard error.
"""

import sys

from configs.errors import InputError
from configs.library_warnings import quiet_libraries
from configs.lighter_imports import lighten_imports
from configs.loading import load_config
from configs.supervision import BAD_INPUT
from data.encoders.model_folder import find_model


def main() -> int:
    quiet_libraries()
    lighten_imports()
    from trainer.method import check_init_from

    try:
        config = load_config(sys.argv[1], sys.argv[2:])
        if config.method.type != "full" and config.method.init_from is not None:
            check_init_from(config.method, find_model(config.model.base, download=False))
    except InputError as error:
        print(error)
        return BAD_INPUT
    return 0


if __name__ == "__main__":
    sys.exit(main())
