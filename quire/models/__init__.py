"""Model families, one flat file each: config, module, weight names."""
