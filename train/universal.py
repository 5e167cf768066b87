"""DeepSpeed's conversion to universal checkpoints in a process of its own, which loads tensors only.

python -m refreshkv.train.universal --input_folder CHECKPOINT --output_folder UNIVERSAL
"""

import multiprocessing

from deepspeed.checkpoint import ds_to_universal

from refreshkv.train.safe_loading import tensors_only

if __name__ == "__main__":
    multiprocessing.set_start_method("fork")  # its workers then know the classes that may be loaded
    with tensors_only():
        ds_to_universal.main(ds_to_universal.parse_arguments())
