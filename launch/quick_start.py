"""`fluxfill quickstart` under the name of the document that people migrate by:

python -m launch.quick_start --gpu_memory 80GB --num_gpus 2
"""

import sys

from launch.cli import app

if __name__ == "__main__":
    app(["quickstart", *sys.argv[1:]])
