"""From what a user calls a model to files on this disk: named models, paths, hub ids; wheels fetched by pip."""
