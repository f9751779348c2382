"""Options: the schema, the names of other trainers, and the command line's parser."""
