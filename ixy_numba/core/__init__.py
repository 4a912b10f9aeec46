"""What every driver stands on: compilation, ordered memory access, registers, DMA memory, packet buffers."""
