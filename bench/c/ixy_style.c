/* A forwarder by ixy's algorithm: a metadata header in front of each packet, a buffer allocated and freed a packet. */
#include "nic.h"
#include "handlers.h"

enum { HEADER = 64, BUFFER = 2048, CLEAN_BATCH = 32 };

struct pool;

struct packet { /* the first 64 bytes of a buffer */
    uint64_t bus_addr;
    struct pool *pool;
    uint32_t index, size;
    uint8_t headroom[40];
    uint8_t data[];
};

struct pool {
    uint8_t *base;
    uint32_t buffer_size, entries, top;
    uint32_t free[BUFFERS];
};

struct rx_queue {
    volatile struct descriptor *ring;
    struct pool *pool;
    volatile struct queue_registers *regs;
    uint16_t entries, index;
    bool port; /* read from memory: no compiler makes a copy of the code for each port, which predicts badly */
    void *held[RING];
};

struct tx_queue {
    volatile struct descriptor *ring;
    volatile struct queue_registers *regs;
    uint16_t entries, clean, index;
    void *held[RING];
};

struct ixy_style {
    struct rx_queue rx[PORTS];
    struct tx_queue tx[PORTS];
    struct pool pool[PORTS]; /* one a receive queue */
    struct queue_registers rx_regs[PORTS], tx_regs[PORTS];
};

static inline struct packet *packet_alloc(struct pool *pool)
{
    if (pool->top == 0)
        return NULL;
    return (struct packet *)(pool->base + (uint64_t)pool->free[--pool->top] * pool->buffer_size);
}

static inline void packet_free(struct packet *packet)
{
    struct pool *pool = packet->pool;
    pool->free[pool->top++] = packet->index;
}

static inline uint16_t wrap(uint16_t index, uint16_t entries)
{
    return (uint16_t)((index + 1) & (entries - 1));
}

static uint32_t rx_batch(struct rx_queue *queue, struct packet *packets[], uint32_t limit)
{
    uint16_t index = queue->index, last = index;
    uint32_t n;
    for (n = 0; n < limit; n++) {
        volatile struct descriptor *ring_desc = &queue->ring[index];
        uint64_t status = ring_desc->status;
        if (!(status & RX_DD))
            break;
        if (!(status & RX_EOP))
            __builtin_trap(); /* ixy ends the process: jumbo frames are not supported */
        struct packet *packet = queue->held[index];
        packet->size = (uint16_t)(status >> 32);
        struct packet *fresh = packet_alloc(queue->pool);
        if (!fresh)
            __builtin_trap(); /* ixy ends the process: out of buffers */
        ring_desc->addr = fresh->bus_addr + HEADER;
        ring_desc->status = 0;
        queue->held[index] = fresh;
        packets[n] = packet;
        last = index;
        index = wrap(index, queue->entries);
    }
    if (index != last) {
        set_register(&queue->regs->tail, last);
        queue->index = index;
    }
    return n;
}

static void tx_clean(struct tx_queue *queue)
{
    for (;;) {
        int cleanable = queue->index - queue->clean;
        if (cleanable < 0)
            cleanable += queue->entries;
        if (cleanable < CLEAN_BATCH)
            return;
        int last = queue->clean + CLEAN_BATCH - 1;
        if (last >= queue->entries)
            last -= queue->entries;
        if (!(queue->ring[last].status & TX_DD))
            return;
        for (int i = queue->clean;; i = wrap((uint16_t)i, queue->entries)) {
            packet_free(queue->held[i]);
            if (i == last)
                break;
        }
        queue->clean = wrap((uint16_t)last, queue->entries);
    }
}

static uint32_t tx_batch(struct tx_queue *queue, struct packet *packets[], uint32_t count)
{
    uint32_t sent;
    tx_clean(queue);
    for (sent = 0; sent < count; sent++) {
        uint16_t next = wrap(queue->index, queue->entries);
        if (next == queue->clean)
            break;
        struct packet *packet = packets[sent];
        queue->held[queue->index] = packet;
        volatile struct descriptor *desc = &queue->ring[queue->index];
        desc->addr = packet->bus_addr + HEADER;
        desc->status = TX_DATA | TX_ONE_BUFFER | TX_RS | packet->size | TX_PAYLEN(packet->size);
        queue->index = next;
    }
    set_register(&queue->regs->tail, queue->index);
    return sent;
}

static void forward(struct rx_queue *rx, struct tx_queue *tx, uint32_t batch)
{
    struct packet *packets[MAX_BATCH];
    uint32_t n = rx_batch(rx, packets, batch), kept = 0;
    if (n == 0)
        return;
    for (uint32_t k = 0; k < n; k++) {
        if (HANDLER(packets[k]->data, packets[k]->size, rx->port) == DROP) {
            packet_free(packets[k]);
            continue;
        }
        if (kept != k) /* else compilers copy the array onto itself, with wide loads that stall behind narrow stores */
            packets[kept] = packets[k];
        kept++;
    }
    for (uint32_t k = tx_batch(tx, packets, kept); k < kept; k++)
        packet_free(packets[k]);
}

/* ---- what the benchmark calls */

uint64_t ixy_style_state_bytes(void)
{
    return sizeof(struct ixy_style);
}

uint64_t ixy_style_dma_bytes(void)
{
    return PORTS * (2 * RING * sizeof(struct descriptor) + BUFFERS * (uint64_t)BUFFER);
}

void ixy_style_open(struct ixy_style *d, uint8_t *dma, struct port *ports)
{
    for (int p = 0; p < PORTS; p++) {
        struct pool *pool = &d->pool[p];
        struct rx_queue *rx = &d->rx[p];
        struct tx_queue *tx = &d->tx[p];
        *pool = (struct pool){.base = dma, .buffer_size = BUFFER, .entries = BUFFERS, .top = BUFFERS};
        dma += BUFFERS * BUFFER;
        for (uint32_t k = 0; k < BUFFERS; k++) {
            struct packet *packet = (struct packet *)(pool->base + (uint64_t)k * BUFFER);
            *packet = (struct packet){.bus_addr = (uintptr_t)packet, .pool = pool, .index = k};
            pool->free[k] = BUFFERS - 1 - k;
        }
        *rx = (struct rx_queue){.ring = (void *)dma, .pool = pool, .regs = &d->rx_regs[p], .entries = RING, .port = p};
        dma += RING * sizeof(struct descriptor);
        *tx = (struct tx_queue){.ring = (void *)dma, .regs = &d->tx_regs[p], .entries = RING};
        dma += RING * sizeof(struct descriptor);
        for (int k = 0; k < RING; k++) {
            struct packet *packet = packet_alloc(pool);
            rx->held[k] = packet;
            rx->ring[k].addr = packet->bus_addr + HEADER;
            rx->ring[k].status = 0;
        }
        rx->regs->tail = RING - 1;
        ports[p] = (struct port){(uintptr_t)rx->ring, (uintptr_t)&rx->regs->tail,
                                 (uintptr_t)tx->ring, (uintptr_t)&tx->regs->tail, 0, 0};
    }
}

/* `passes` times one batch each way. */
void ixy_style_batch(struct ixy_style *d, uint64_t batch, uint64_t passes)
{
    for (uint64_t k = 0; k < passes; k++) {
        forward(&d->rx[0], &d->tx[1], (uint32_t)batch);
        forward(&d->rx[1], &d->tx[0], (uint32_t)batch);
    }
}

/* How many buffers are accounted for exactly once: free, waiting for a packet, or being sent. */
uint64_t ixy_style_audit(struct ixy_style *d)
{
    static uint8_t seen[PORTS * BUFFERS];
    uint64_t distinct = 0;
    memset(seen, 0, sizeof seen);
#define SEE(packet) distinct += !seen[((packet)->pool - d->pool) * BUFFERS + (packet)->index]++
    for (int p = 0; p < PORTS; p++) {
        for (uint32_t k = 0; k < d->pool[p].top; k++)
            SEE((struct packet *)(d->pool[p].base + (uint64_t)d->pool[p].free[k] * BUFFER));
        for (int k = 0; k < RING; k++)
            SEE((struct packet *)d->rx[p].held[k]);
        for (uint16_t k = d->tx[p].clean; k != d->tx[p].index; k = wrap(k, RING))
            SEE((struct packet *)d->tx[p].held[k]);
    }
    return distinct;
}

uint64_t ixy_style_buffers(void)
{
    return PORTS * BUFFERS;
}
