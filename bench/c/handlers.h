/* The benchmark's handlers as C has them; -DHANDLER=name chooses one. Each returns the output port or DROP. */
#ifndef HANDLERS_H
#define HANDLERS_H

#include <stdint.h>
#include <string.h>

#define DROP (-1)

#ifndef HANDLER
#define HANDLER touch
#endif

static inline int touch(uint8_t *data, uint32_t length, int port)
{
    (void)length;
    data[1]++;
    return 1 - port;
}

static inline int mac_swap(uint8_t *data, uint32_t length, int port)
{
    uint8_t source[6];
    if (length < 14)
        return DROP;
    memcpy(source, data + 6, 6);
    memcpy(data + 6, data, 6);
    memcpy(data, source, 6);
    return 1 - port;
}

static inline uint16_t be16(const uint8_t *at)
{
    return (uint16_t)(at[0] << 8 | at[1]);
}

/* Drop unfragmented IPv4 UDP to port 9 (discard), let all else pass. */
static inline int udp_filter(uint8_t *data, uint32_t length, int port)
{
    if (length >= 42 && be16(data + 12) == 0x0800 && data[14] == 0x45 && data[23] == 17
        && (be16(data + 20) & 0x3FFF) == 0 && be16(data + 36) == 9)
        return DROP;
    return 1 - port;
}

#endif
