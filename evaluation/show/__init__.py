"""One generation as a page: what each layer and head kept at each choice (`refreshkv show`)."""
