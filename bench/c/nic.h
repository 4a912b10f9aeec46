/* What the rivals in C share: the 82599's descriptors, a port as the NIC model sees it, ordered register access. */
#ifndef NIC_H
#define NIC_H

#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { RING = 512, BUFFERS = 4096, MAX_BATCH = 256, PORTS = 2 };

/* Advanced descriptors (datasheet 7.1.6, 7.2.3.2.4); receive and transmit have the same shape. */
struct descriptor {
    uint64_t addr;
    uint64_t status; /* receive: status, length; transmit: command, and the status written back */
};

#define RX_DD (UINT64_C(1) << 0)
#define RX_EOP (UINT64_C(1) << 1)
#define RX_ERROR (UINT64_C(1) << 29)
#define TX_DATA (UINT64_C(3) << 20 | UINT64_C(1) << 29)       /* DTYP = data, DEXT */
#define TX_ONE_BUFFER (UINT64_C(1) << 24 | UINT64_C(1) << 25) /* EOP, IFCS */
#define TX_RS (UINT64_C(1) << 27)
#define TX_DD (UINT64_C(1) << 32)
#define TX_PAYLEN(length) ((uint64_t)(length) << 46)

/* Legacy descriptors (7.1.5, 7.2.3.2.2): the write-back leaves `addr` alone. */
#define LEGACY_DD (UINT64_C(1) << 32)
#define LEGACY_EOP (UINT64_C(1) << 33)
#define LEGACY_ERROR (UINT64_C(0xFF) << 40)
#define LEGACY_LENGTH UINT64_C(0xFFFF)
#define LEGACY_ONE_BUFFER (UINT64_C(1) << 24 | UINT64_C(1) << 25)
#define LEGACY_RS (UINT64_C(1) << 27)

/* Where the NIC finds one port's rings and tail registers: addresses. `head` is 0 without head write-back. */
struct port {
    uint64_t rx_ring, rx_tail, tx_ring, tx_tail, head, legacy;
};

/* A queue's block of registers in BAR 0, as far as these drivers use it. */
struct queue_registers {
    _Alignas(64) uint32_t unused[6];
    uint32_t tail, more[9];
};

static inline void set_register(volatile uint32_t *where, uint32_t value)
{
    __asm__ volatile("" ::: "memory"); /* all earlier stores first; x86-64 itself keeps them in order */
    *where = value;
}

#endif
