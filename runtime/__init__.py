"""The ground floor: errors, files, random numbers, processes and devices, configs. Imports nothing of this project."""
