/* The design of ixy_numba's kernels in C: packed handles, a stack of free buffers, one address word a buffer.
 *
 * Three forms: `batch` (receive, touch, transmit, each over an array of handles), `fused` (one loop, no handles), and
 * `in_place` (a packet is sent from the buffer that it was received into: no pool).
 */
#include "nic.h"
#include "handlers.h"

enum { STRIDE = 2176, CLEAN_BLOCK = 32, RECYCLE = 64, MASK = RING - 1 };

struct pool {
    uint64_t top;
    uint64_t word[BUFFERS]; /* the address as the NIC sees it */
    uint32_t free[BUFFERS];
    uint8_t *memory;
};

struct rx_queue {
    struct descriptor *ring;
    struct queue_registers *regs;
    uint64_t index;
    bool port; /* read from memory: no compiler makes a copy of the code for each port, which predicts badly */
    uint32_t held[RING];
};

struct tx_queue {
    struct descriptor *ring;
    struct queue_registers *regs;
    uint64_t tail, clean;
    uint32_t held[RING];
};

struct same_design {
    struct rx_queue rx[PORTS];
    struct tx_queue tx[PORTS];
    struct queue_registers rx_regs[PORTS], tx_regs[PORTS];
    struct pool pool;
};

#define LOAD_ACQUIRE(where) __atomic_load_n(&(where), __ATOMIC_ACQUIRE)
#define PACKET(memory, index) ((memory) + (uint64_t)(index) * STRIDE)

/* A whole frame that fits its buffer: end of packet, no MAC error, 1 to 2048 bytes. */
static inline bool sound(uint64_t status)
{
    uint64_t length = status >> 32 & 0xFFFF;
    return (status & (RX_EOP | RX_ERROR)) == RX_EOP && length - 1 < 2048;
}

static inline uint64_t tx_command(uint64_t tail, uint64_t length)
{
    uint64_t report = ((tail + 1) & (CLEAN_BLOCK - 1)) == 0 ? TX_RS : 0;
    return TX_DATA | TX_ONE_BUFFER | report | length | TX_PAYLEN(length);
}

static uint64_t tx_space(struct tx_queue *tx, struct pool *pool)
{
    uint64_t clean = tx->clean;
    while (((tx->tail - clean) & MASK) >= CLEAN_BLOCK) {
        if (!(LOAD_ACQUIRE(tx->ring[clean + CLEAN_BLOCK - 1].status) & TX_DD))
            break;
        memcpy(pool->free + pool->top, tx->held + clean, CLEAN_BLOCK * sizeof *tx->held);
        pool->top += CLEAN_BLOCK;
        clean = (clean + CLEAN_BLOCK) & MASK;
    }
    tx->clean = clean;
    return (clean - tx->tail - 1) & MASK;
}

/* Below, what a packet needs is copied to locals first: a store to a packet may alias anything, as far as C knows, and
 * compilers would load every pointer again after it. */

/* ---- batch: a handle is a buffer's index and, from bit 32, the length */

static uint64_t rx_batch(struct rx_queue *rx, struct pool *pool, uint64_t *handles, uint64_t limit)
{
    struct descriptor *const ring = rx->ring;
    uint64_t i = rx->index, n = 0, top = pool->top, seen;
    if (limit > top)
        limit = top;
    for (seen = 0; seen < limit; seen++) {
        struct descriptor *desc = &ring[i];
        uint64_t status = LOAD_ACQUIRE(desc->status);
        if (!(status & RX_DD))
            break;
        uint32_t index = rx->held[i];
        if (sound(status)) {
            handles[n++] = index | (status & UINT64_C(0xFFFF) << 32);
            index = pool->free[--top];
            rx->held[i] = index;
        }
        *desc = (struct descriptor){pool->word[index], 0};
        i = (i + 1) & MASK;
    }
    if (seen) {
        pool->top = top;
        rx->index = i;
        set_register(&rx->regs->tail, (i - 1) & MASK);
    }
    return n;
}

static uint64_t tx_batch(struct tx_queue *tx, struct pool *pool, const uint64_t *handles, uint64_t count)
{
    struct descriptor *const ring = tx->ring;
    uint64_t space = tx_space(tx, pool), tail = tx->tail;
    if (count > space)
        count = space;
    for (uint64_t k = 0; k < count; k++) {
        uint32_t index = (uint32_t)handles[k];
        tx->held[tail] = index;
        ring[tail] = (struct descriptor){pool->word[index], tx_command(tail, handles[k] >> 32)};
        tail = (tail + 1) & MASK;
    }
    if (count) {
        tx->tail = tail;
        set_register(&tx->regs->tail, tail);
    }
    return count;
}

static void forward_batch(struct rx_queue *rx, struct tx_queue *tx, struct pool *pool, uint64_t batch)
{
    uint8_t *const memory = pool->memory;
    const bool port = rx->port;
    uint64_t handles[MAX_BATCH], kept = 0, n = rx_batch(rx, pool, handles, batch);
    for (uint64_t k = 0; k < n; k++) {
        uint64_t handle = handles[k];
        if (HANDLER(PACKET(memory, (uint32_t)handle), (uint32_t)(handle >> 32), port) == DROP) {
            pool->free[pool->top++] = (uint32_t)handle;
            continue;
        }
        if (kept != k) /* else compilers copy the array onto itself, with wide loads that stall behind narrow stores */
            handles[kept] = handle;
        kept++;
    }
    for (uint64_t k = tx_batch(tx, pool, handles, kept); k < kept; k++)
        pool->free[pool->top++] = (uint32_t)handles[k];
}

/* ---- fused */

static void forward_fused(struct rx_queue *rx, struct tx_queue *tx, struct pool *pool, uint64_t batch)
{
    struct descriptor *const rx_ring = rx->ring, *const tx_ring = tx->ring;
    uint8_t *const memory = pool->memory;
    const bool port = rx->port;
    uint64_t room = tx_space(tx, pool), i = rx->index, tail = tx->tail, top = pool->top, n;
    if (batch > room)
        batch = room;
    if (batch > top)
        batch = top;
    for (n = 0; n < batch; n++) {
        struct descriptor *desc = &rx_ring[i];
        uint64_t status = LOAD_ACQUIRE(desc->status), length = status >> 32 & 0xFFFF;
        if (!(status & RX_DD))
            break;
        uint32_t index = rx->held[i];
        if (sound(status) && HANDLER(PACKET(memory, index), (uint32_t)length, port) != DROP) {
            tx->held[tail] = index;
            tx_ring[tail] = (struct descriptor){pool->word[index], tx_command(tail, length)};
            tail = (tail + 1) & MASK;
            index = pool->free[--top];
            rx->held[i] = index;
        }
        *desc = (struct descriptor){pool->word[index], 0};
        i = (i + 1) & MASK;
    }
    if (tail != tx->tail) {
        pool->top = top;
        tx->tail = tail;
        set_register(&tx->regs->tail, tail);
    }
    if (n) {
        rx->index = i;
        set_register(&rx->regs->tail, (i - 1) & MASK);
    }
}

/* ---- in place: the receive ring is the other port's transmit ring; legacy descriptors keep the address */

struct agent {
    struct descriptor *ring;
    uint8_t *memory;
    struct queue_registers *rx_regs, *tx_regs;
    uint64_t index;
    bool port;
    uint32_t *head; /* how far the NIC has sent: it writes it after a descriptor with RS */
};

struct in_place {
    struct agent agent[PORTS];
    struct queue_registers rx_regs[PORTS], tx_regs[PORTS];
};

static void forward_in_place(struct agent *agent, uint64_t batch)
{
    struct descriptor *const ring = agent->ring;
    uint8_t *const memory = agent->memory;
    const bool port = agent->port;
    uint64_t i = agent->index, n;
    for (n = 0; n < batch; n++) {
        struct descriptor *desc = &ring[i];
        uint64_t status = LOAD_ACQUIRE(desc->status), length = status & LEGACY_LENGTH;
        if (!(status & LEGACY_DD))
            break;
        bool good = (status & (LEGACY_EOP | LEGACY_ERROR)) == LEGACY_EOP && length - 1 < 2048;
        if (!good || HANDLER(PACKET(memory, i), (uint32_t)length, port) == DROP)
            length = 0; /* a descriptor without data: nothing is sent */
        bool report = (i & (RECYCLE - 1)) == RECYCLE - 1;
        desc->status = length | LEGACY_ONE_BUFFER | (report ? LEGACY_RS : 0);
        i = (i + 1) & MASK;
        if (report)
            set_register(&agent->rx_regs->tail, (LOAD_ACQUIRE(*agent->head) - 1) & MASK);
    }
    if (n) {
        agent->index = i;
        set_register(&agent->tx_regs->tail, (uint32_t)i);
    }
}

/* ---- what the benchmark calls */

uint64_t same_design_state_bytes(void)
{
    return sizeof(struct same_design);
}

uint64_t same_design_dma_bytes(void)
{
    return PORTS * 2 * RING * sizeof(struct descriptor) + (uint64_t)BUFFERS * STRIDE;
}

void same_design_open(struct same_design *d, uint8_t *dma, struct port *ports)
{
    struct pool *pool = &d->pool;
    *pool = (struct pool){.top = BUFFERS, .memory = dma + PORTS * 2 * RING * sizeof(struct descriptor)};
    for (uint32_t k = 0; k < BUFFERS; k++) {
        pool->word[k] = (uintptr_t)PACKET(pool->memory, k);
        pool->free[k] = BUFFERS - 1 - k;
    }
    for (int p = 0; p < PORTS; p++) {
        struct rx_queue *rx = &d->rx[p];
        struct tx_queue *tx = &d->tx[p];
        *rx = (struct rx_queue){.ring = (struct descriptor *)dma + 2 * p * RING, .regs = &d->rx_regs[p], .port = p};
        *tx = (struct tx_queue){.ring = (struct descriptor *)dma + (2 * p + 1) * RING, .regs = &d->tx_regs[p]};
        for (int k = 0; k < RING; k++) {
            rx->held[k] = pool->free[--pool->top];
            rx->ring[k] = (struct descriptor){pool->word[rx->held[k]], 0};
        }
        rx->regs->tail = RING - 1;
        ports[p] = (struct port){(uintptr_t)rx->ring, (uintptr_t)&rx->regs->tail,
                                 (uintptr_t)tx->ring, (uintptr_t)&tx->regs->tail, 0, 0};
    }
}

/* `passes` times one batch each way. */
void same_design_batch(struct same_design *d, uint64_t batch, uint64_t passes)
{
    for (uint64_t k = 0; k < passes; k++) {
        forward_batch(&d->rx[0], &d->tx[1], &d->pool, batch);
        forward_batch(&d->rx[1], &d->tx[0], &d->pool, batch);
    }
}

void same_design_fused(struct same_design *d, uint64_t batch, uint64_t passes)
{
    for (uint64_t k = 0; k < passes; k++) {
        forward_fused(&d->rx[0], &d->tx[1], &d->pool, batch);
        forward_fused(&d->rx[1], &d->tx[0], &d->pool, batch);
    }
}

/* How many buffers are accounted for exactly once: free, waiting for a packet, or being sent. */
uint64_t same_design_audit(struct same_design *d)
{
    static uint8_t seen[BUFFERS];
    uint64_t distinct = 0;
    memset(seen, 0, sizeof seen);
    for (uint64_t k = 0; k < d->pool.top; k++)
        distinct += !seen[d->pool.free[k]]++;
    for (int p = 0; p < PORTS; p++) {
        for (int k = 0; k < RING; k++)
            distinct += !seen[d->rx[p].held[k]]++;
        for (uint64_t k = d->tx[p].clean; k != d->tx[p].tail; k = (k + 1) & MASK)
            distinct += !seen[d->tx[p].held[k]]++;
    }
    return distinct;
}

uint64_t same_design_buffers(void)
{
    return BUFFERS;
}

uint64_t in_place_state_bytes(void)
{
    return sizeof(struct in_place);
}

uint64_t in_place_dma_bytes(void)
{
    return PORTS * (RING * (sizeof(struct descriptor) + (uint64_t)STRIDE) + 64);
}

void in_place_open(struct in_place *d, uint8_t *dma, struct port *ports)
{
    for (int p = 0; p < PORTS; p++) {
        struct agent *agent = &d->agent[p];
        *agent = (struct agent){.ring = (void *)dma, .port = p, .rx_regs = &d->rx_regs[p],
                                .tx_regs = &d->tx_regs[1 - p]};
        dma += RING * sizeof(struct descriptor);
        agent->head = (void *)dma; /* a line of its own */
        *agent->head = 0;
        agent->memory = dma += 64;
        dma += RING * STRIDE;
        for (uint64_t k = 0; k < RING; k++)
            agent->ring[k] = (struct descriptor){(uintptr_t)agent->memory + k * STRIDE, 0};
        agent->rx_regs->tail = RING - 1;
    }
    for (int p = 0; p < PORTS; p++) {
        struct agent *in = &d->agent[p], *out = &d->agent[1 - p];
        ports[p] = (struct port){(uintptr_t)in->ring, (uintptr_t)&d->rx_regs[p].tail, (uintptr_t)out->ring,
                                 (uintptr_t)&d->tx_regs[p].tail, (uintptr_t)out->head, 1};
    }
}

void in_place_run(struct in_place *d, uint64_t batch, uint64_t passes)
{
    for (uint64_t k = 0; k < passes; k++) {
        forward_in_place(&d->agent[0], batch);
        forward_in_place(&d->agent[1], batch);
    }
}

/* The buffers whose address is still in their own descriptor: all of them, always. */
uint64_t in_place_audit(struct in_place *d)
{
    uint64_t good = 0;
    for (int p = 0; p < PORTS; p++)
        for (uint64_t k = 0; k < RING; k++)
            good += d->agent[p].ring[k].addr == (uintptr_t)d->agent[p].memory + k * STRIDE;
    return good;
}

uint64_t in_place_buffers(void)
{
    return PORTS * RING;
}
