/* Which thread does what of a call, and in which order.

   Where every thread gets about as many channels, planes are done channel by channel, from sums to map, as many at a
   time as fit into a core's cache. Otherwise, and for rows, the threads take parts of the batch: all sum, then the
   channels are finished, then all map. */

#define BLOCK (1 << 15) /* elements that are mapped at a time, of rows */
#define MANY 512        /* channels whose statistics are worth sharing out among the threads */

static ParallelFor parallel_for; /* told by `runningbn_initialize` */

/* One call, forward or backward, as `execute` in cpu.c prepares it. */
typedef struct {
    const Forward *forward;
    const Backward *backward; /* one of the two is NULL */
    const Loops *loops;
    Scratch scratch;
    int64_t stages, rows, outer, channels, inner, threads, group;
    const void *dy, *x;
    void *out;
} Job;

static void run(int64_t count, Task task, Job *job) {
    if (count > 1)
        parallel_for(0, count, 1, task, job);
    else
        task(0, 1, job);
}

static void finish(const Job *job, int64_t begin, int64_t end) {
    if (job->forward)
        job->loops->finish_forward(job->forward, &job->scratch, begin, end);
    else
        job->loops->finish_backward(job->backward, &job->scratch, begin, end);
}

static void finish_of_parts(int64_t begin, int64_t end, void *context) {
    const Job *job = context;
    for (int64_t t = begin; t < end; t++)
        finish(job, job->channels * t / job->threads, job->channels * (t + 1) / job->threads);
}

static void sums_of_group(const Job *job, int64_t begin, int64_t end) {
    const Scratch *s = &job->scratch;
    job->loops->planes_sums(job->dy, job->x, s->pivot, job->channels, job->inner, 0, job->outer, begin, end, 0,
                            job->inner, s->first, s->second);
}

/* The pivots of some channels to their means, by the sums about what the pivots were. */
static void move_pivots(const Job *job, int64_t begin, int64_t end) {
    const double n = (double)(job->outer * job->inner);
    const int64_t channels = job->channels;
    double *pivot = job->scratch.pivot;
    for (int64_t c = begin; c < end; c++) {
        const double mean = pivot[c] + job->scratch.first[c] / n;
        for (int64_t i = 0; i < job->scratch.repeats; i++) pivot[i * channels + c] = mean;
    }
}

/* Whether the sums are taken once more, about the means: no pivot is near enough for double data. */
static int sums_twice(const Job *job) { return job->forward && job->forward->dtype == FLOAT64; }

/* The elements from `offset` on. */
static const void *advance(const Job *job, const void *data, int64_t offset) {
    return data ? (const char *)data + offset * job->loops->element_size : NULL;
}

/* Wide rows, in blocks that go backwards: what the sums have read last is still in cache. Within a block they go
   forwards, as memory is fetched ahead. */
static void map_rows(const Job *job, int64_t begin, int64_t end) {
    const int64_t most = BLOCK / job->scratch.columns + 1;
    for (int64_t stop = end; stop > begin; stop -= most)
        job->loops->rows_map(job->dy, job->x, job->out, &job->scratch, job->scratch.columns,
                             stop - most > begin ? stop - most : begin, stop);
}

/* Channels of a thread, from sums to map. */
static void by_channels(int64_t begin, int64_t end, void *context) {
    const Job *job = context;
    for (int64_t t = begin; t < end; t++) {
        const int64_t stop = job->channels * (t + 1) / job->threads;
        for (int64_t c = job->channels * t / job->threads; c < stop; c += job->group) {
            const int64_t next = c + job->group < stop ? c + job->group : stop;
            if (job->stages & SUMS) {
                sums_of_group(job, c, next);
                if (sums_twice(job)) {
                    move_pivots(job, c, next);
                    sums_of_group(job, c, next);
                }
            }
            finish(job, c, next);
            if (job->stages & APPLY)
                job->loops->planes_map(job->dy, job->x, job->out, &job->scratch, job->channels, job->inner, 0,
                                       job->outer, c, next, 0, job->inner);
        }
    }
}

/* Part t of a batch: wide rows, or samples, or where those are few, elements of each plane. */
typedef struct {
    int64_t begin, end, inner_begin, inner_end;
} Part;

static Part part_of(const Job *job, int64_t t) {
    const int64_t parts = job->threads;
    if (job->rows) {
        const int64_t rows = job->outer / job->scratch.repeats;
        return (Part){rows * t / parts, rows * (t + 1) / parts, 0, 1};
    }
    if (job->outer >= 4 * parts || job->outer % parts == 0)
        return (Part){job->outer * t / parts, job->outer * (t + 1) / parts, 0, job->inner};
    return (Part){0, job->outer, job->inner * t / parts, job->inner * (t + 1) / parts};
}

static void sums_of_parts(int64_t begin, int64_t end, void *context) {
    const Job *job = context;
    const Scratch *s = &job->scratch;
    for (int64_t t = begin; t < end; t++) {
        const Part part = part_of(job, t);
        double *first = s->first + t * s->columns, *second = s->second + t * s->columns;
        if (job->rows) {
            job->loops->rows_sums(job->dy, job->x, s->pivot, s->columns, part.begin, part.end, first, second);
        } else {
            for (int64_t c = 0; c < job->channels; c += GROUP)
                job->loops->planes_sums(job->dy, job->x, s->pivot, job->channels, job->inner, part.begin, part.end, c,
                                        c + GROUP < job->channels ? c + GROUP : job->channels, part.inner_begin,
                                        part.inner_end, first, second);
        }
    }
}

static void map_of_parts(int64_t begin, int64_t end, void *context) {
    const Job *job = context;
    for (int64_t t = begin; t < end; t++) {
        const Part part = part_of(job, t);
        if (job->rows)
            map_rows(job, part.begin, part.end);
        else
            job->loops->planes_map(job->dy, job->x, job->out, &job->scratch, job->channels, job->inner, part.begin,
                                   part.end, 0, job->channels, part.inner_begin, part.inner_end);
    }
}

static void sums_by_parts(Job *job) {
    const Scratch *s = &job->scratch;
    const int64_t channels = job->channels, whole = job->outer - job->outer % s->repeats;
    run(job->threads, sums_of_parts, job);
    for (int64_t t = 0; t < job->threads; t++)
        for (int64_t i = t == 0; i < s->repeats; i++)
            for (int64_t c = 0; c < channels; c++) {
                s->first[c] += s->first[t * s->columns + i * channels + c];
                s->second[c] += s->second[t * s->columns + i * channels + c];
            }
    if (job->rows && whole < job->outer) {
        double *first = s->first + s->columns * job->threads, *second = s->second + s->columns * job->threads;
        job->loops->rows_sums(advance(job, job->dy, whole * channels), advance(job, job->x, whole * channels),
                              s->pivot, channels, 0, job->outer - whole, first, second);
        for (int64_t c = 0; c < channels; c++) s->first[c] += first[c], s->second[c] += second[c];
    }
}

static void by_parts(Job *job) {
    const Scratch *s = &job->scratch;
    const int64_t whole = job->outer - job->outer % s->repeats, channels = job->channels;
    if (job->stages & SUMS) {
        sums_by_parts(job);
        if (sums_twice(job)) {
            move_pivots(job, 0, channels);
            sums_by_parts(job);
        }
    }
    if (channels >= MANY)
        run(job->threads, finish_of_parts, job);
    else
        finish(job, 0, channels);
    if (!(job->stages & APPLY)) return;
    run(job->threads, map_of_parts, job);
    if (job->rows && whole < job->outer)
        job->loops->rows_map(advance(job, job->dy, whole * channels), advance(job, job->x, whole * channels),
                             (void *)advance(job, job->out, whole * channels), s, channels, 0, job->outer - whole);
}
