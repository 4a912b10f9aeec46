/* The rival as a program of its own: set up, one pass, end. Its start-up time is compared with ours. */
#include "ixy_style.c"

#include <stdlib.h>

int main(void)
{
    struct port ports[PORTS];
    uint8_t *dma = aligned_alloc(4096, ixy_style_dma_bytes());
    struct ixy_style *driver = aligned_alloc(64, (sizeof *driver + 63) / 64 * 64);
    if (!dma || !driver)
        return 1;
    ixy_style_open(driver, dma, ports);
    ixy_style_batch(driver, 32, 1);
    return ixy_style_audit(driver) != ixy_style_buffers();
}
