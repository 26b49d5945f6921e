"""Pictures -> triples -> shards -> batches. Knows neither the trainer nor accelerate.

Pictures    sources.py lists triples (source_folders, source_tars, source_tables; urls, remote_copies, tar_headers,
            picture_files, folder_walk); pictures.py opens what strangers made (colour_profile), scan.py looks at each
            once (scan_results).
Samples     plan_samples.py: bucket and crop (geometry), holes (masks, mask_recipe), split; shard_plan.py: which shard.
Encoding    encode.py is the Fill arithmetic (load_encoders, model_folder, caption_texts, constants); encode_shards.py
            makes shards of it, decoding ahead and writing behind (decode_samples, run_ahead).
The job     preprocess.py: any number of workers (which_worker) share a plan (share_plan, plan_file) and claim shards
            (crew, backlog); dry_run and preprocess_report tell people. What runs out is told: full_disk, device_memory;
            what NFS takes away is read again: stale_files.
The cache   shards.py is one tar and its index (stored_tensors, stored_text, blanks); manifest.py and cache_head.py the
            head, cache.py opens it, shard_copies.py and remote_head.py from a URL; verify.py and repair.py watch over
            it; cache_statistics, sample_sheet and validation_items show it.
Batches     order.py says which sample stands where, noise.py what is random about it; reader.py begins micro-batches
            (micro_batch) ahead, row_source.py is the seam to what fills them: shard_rows.py reads (shard_reader,
            prefetch), encoded_rows.py encodes (online, batch_encoder); row_filler.py is what both have in common.
            write_through.py makes shards beside it and finished_shards.py reads them, by turns (encoder_turns).
"""
