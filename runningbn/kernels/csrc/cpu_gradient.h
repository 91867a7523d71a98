/* Between the sums of a backward and the map: let them enter the state, and say what the gradient is made of.
   Included after cpu_state.h, whose loops over chunks these are, too. */

/* See law.bounded: what scales the running means `m0` and `m1`, of a batch whose means are `p0` and `p1`. A batch that
   is not finite is no reason to subtract anything. */
TARGET INLINE double STATE_NAME(scale_of_means)(double offset, double spread, double m0, double m1, double p0,
                                                double p1) {
    const double across = p1 - offset * p0, constant = m0 + offset * m1, slope = spread * m1;
    const int varies = spread > sqrt(EPSILON) * fabs(offset);
    if (sizeof(REAL) == sizeof(float)) {
        /* Squares of floats are far from the limits of doubles: no need of hypot, which is no single instruction. */
        const double square = varies ? spread * spread : 1;
        const double of_batch = p0 * p0 * square + (varies ? across * across : 0);
        const double wanted = (constant * constant + slope * slope) * square;
        const double shorter = wanted <= of_batch ? 1 : sqrt(of_batch / wanted);
        return of_batch <= MAXIMUM * MAXIMUM * square ? shorter : 0;
    }
    const double along = varies ? across / largest(spread, TINY) : 0;
    const double of_batch = hypot(p0, along), of_memory = hypot(constant, slope);
    if (!(of_batch <= MAXIMUM)) return 0;
    return of_memory <= of_batch ? 1 : of_batch / largest(of_memory, TINY);
}

/* See update.update_gradient: Σdy and Σdy·z, in `first` and `second`, enter, and s·G0 and s·G1 take their place. */
TARGET static void STATE_NAME(enter_gradient)(const Backward *b, Chunk *k, int64_t begin, int64_t size) {
    const double elements = (double)(b->outer * b->inner);
    if (b->pooled_count) {
        EACH k->n[i] = (double)AT(b->pooled_count);
    } else {
        EACH k->n[i] = elements;
    }
    EACH {
        const double n = k->n[i], trust = (double)AT(b->trust), keep = 1 - trust;
        const double p0 = k->first[i] / n, p1 = k->second[i] / n;
        const int finite = (fabs(k->first[i]) <= MAXIMUM) & (fabs(k->second[i]) <= MAXIMUM);
        const double old_dy = (double)AT(b->sum_dy), old_dy_xhat = (double)AT(b->sum_dy_xhat);
        const double old_count = (double)AT(b->count_dy);
        const double sum_dy = finite ? ROUNDED(keep * old_dy + trust * p0) : old_dy;
        const double sum_dy_xhat = finite ? ROUNDED(keep * old_dy_xhat + trust * p1) : old_dy_xhat;
        const double count = finite ? ROUNDED(keep * old_count + trust) : old_count;
        AT(b->sum_dy) = (REAL)sum_dy, AT(b->sum_dy_xhat) = (REAL)sum_dy_xhat, AT(b->count_dy) = (REAL)count;
        const double rstd = (double)AT(b->rstd), least = largest(count, TINY), m0 = sum_dy / least;
        const double m1 = sum_dy_xhat / least;
        const double scale = STATE_NAME(scale_of_means)((double)AT(b->offset) * rstd, (double)AT(b->batch_std) * rstd,
                                                        m0, m1, p0, p1);
        /* What the forward has ignored is normalised by constants, and no gradient flows through those. */
        const double counted = finite & (trust != 0) ? scale : 0;
        k->first[i] = m0 * counted, k->second[i] = m1 * counted;
    }
    STORE(b->m0, k->first)
    STORE(b->m1, k->second)
}

/* kappa times the sums in `values`, with 1/n for NULL. Where kappa is 0, so is the term: a channel that was not finite
   has sums that are not either. */
TARGET static void STATE_NAME(scale_by)(const void *kappa, double otherwise, double *values, int64_t begin,
                                        int64_t size) {
    if (!kappa) {
        EACH values[i] *= otherwise;
        return;
    }
    EACH {
        const double factor = (double)AT(kappa), term = factor * values[i];
        values[i] = factor == 0 ? 0 : term;
    }
}

TARGET static void STATE_NAME(backward_chunk)(const Backward *b, const Scratch *scratch, int64_t begin, int64_t size) {
    Chunk chunk, *k = &chunk;
    if (b->stages & SUMS) {
        const double *first = scratch->first + begin, *second = scratch->second + begin;
        EACH k->first[i] = first[i], k->second[i] = second[i] * (double)AT(b->rstd);
        STORE(b->batch_sum_dy, k->first)
        STORE(b->batch_sum_dy_xhat, k->second)
    } else if (b->batch_sum_dy) {
        EACH k->first[i] = (double)AT(b->batch_sum_dy), k->second[i] = (double)AT(b->batch_sum_dy_xhat);
    } else {
        EACH k->first[i] = k->second[i] = 0;
    }
    if (b->stages & UPDATE) {
        STATE_NAME(enter_gradient)(b, k, begin, size);
    } else if (b->m0) {
        EACH k->first[i] = (double)AT(b->m0), k->second[i] = (double)AT(b->m1);
    } else {
        const double one = 1 / (double)(b->outer * b->inner);
        STATE_NAME(scale_by)(b->kappa_mean, one, k->first, begin, size);
        STATE_NAME(scale_by)(b->kappa_var, one, k->second, begin, size);
    }
    if (!(b->stages & APPLY)) return;
    /* dx = scale·dy + slope·(x − centre) + base. */
    if (b->weight) {
        EACH k->third[i] = (double)AT(b->rstd) * (double)AT(b->weight);
    } else {
        EACH k->third[i] = (double)AT(b->rstd);
    }
    EACH {
        k->mean[i] = (double)AT(b->mean);
        k->second[i] *= -k->third[i] * (double)AT(b->rstd);
        k->first[i] *= -k->third[i];
    }
    for (int64_t r = 0; r < scratch->repeats; r++) {
        STORE((REAL *)scratch->centre + r * b->channels, k->mean)
        STORE((REAL *)scratch->scale + r * b->channels, k->third)
        STORE((REAL *)scratch->slope + r * b->channels, k->second)
        STORE((REAL *)scratch->base + r * b->channels, k->first)
    }
}

TARGET static void STATE_NAME(finish_backward)(const Backward *b, const Scratch *scratch, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += CHUNK)
        STATE_NAME(backward_chunk)(b, scratch, c, end - c < CHUNK ? end - c : CHUNK);
}

#undef STORE
