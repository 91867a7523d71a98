/* Between the sums of a batch and the map over it: let the sums enter the state, and say what to normalise by.
   Included once for every instruction set and dtype of the statistics, REAL, with MAXIMUM and TINY of that dtype.

   The same equations in plain torch are `_update_batch`, `_update_exact`, `_update_running` and `_update_gradient`
   of ops/update.py, by the functions of ops/law.py and the rules of momentum.py. Here all is in double, and rounded
   where it is stored. Divisions and roots are most of it, so it is done for CHUNK channels at a time, in loops
   without branches, which compilers vectorise. */

#ifndef RUNNINGBN_STATE
#define RUNNINGBN_STATE
#define CHUNK 64 /* channels: some vectors of each kind, together far less than the first cache */
#define EACH _Pragma("omp simd") for (int64_t i = 0; i < size; i++)
/* Of a vector over channels, that of the loop in a chunk which begins at `begin`. */
#define AT(pointer) (((REAL *)(pointer))[begin + i])
/* As what is stored is read again. */
#define ROUNDED(value) ((double)(REAL)(value))
#define INLINE static inline __attribute__((always_inline))

INLINE double largest(double a, double b) { return a > b ? a : b; }
INLINE double smallest(double a, double b) { return a < b ? a : b; }

/* The batch in a chunk of channels: n, its mean, squares about it and variance, its weight; what it is to be normalised
   by; and whatever the loops below hand on. */
typedef struct {
    double n[CHUNK], batch_mean[CHUNK], squares[CHUNK], batch_var[CHUNK], weight[CHUNK];
    double mean[CHUNK], var[CHUNK];
    double first[CHUNK], second[CHUNK], third[CHUNK];
} Chunk;
#endif

#define STORE(pointer, values)                        \
    if (pointer) {                                    \
        EACH AT(pointer) = (REAL)(values)[i];         \
    }

/* a per channel, see momentum.py. */
TARGET static double STATE_NAME(weight_after)(const Forward *f, double samples, double steps) {
    const double n = f->batch_samples;
    if (f->rule == CUMULATIVE) return 1 / (steps + 1);
    if (f->rule == SQUARE_ROOT) return 1 - (1 - f->rule_first) / sqrt(largest(n - 1, 1));
    if (f->rule == HORIZON) {
        /* Of Horizon: samples, start, fraction. */
        const double horizon = largest(f->rule_third * samples, f->rule_second);
        return -expm1(-n / smallest(horizon, f->rule_first));
    }
    return f->rule_first;
}

/* Channels mostly agree, so that one value is computed for many. */
TARGET static void STATE_NAME(batch_weights)(const Forward *f, double *weight, int64_t begin, int64_t size) {
    if (f->rule == GIVEN) {
        EACH weight[i] = (double)AT(f->batch_weight);
        return;
    }
    const REAL *all_samples = (const REAL *)f->samples + begin, *all_steps = (const REAL *)f->steps + begin;
    REAL samples = all_samples[0], steps = all_steps[0];
    double a = STATE_NAME(weight_after)(f, (double)samples, (double)steps);
    for (int64_t i = 0; i < size; i++) {
        if (all_samples[i] != samples || all_steps[i] != steps) {
            samples = all_samples[i], steps = all_steps[i];
            a = STATE_NAME(weight_after)(f, (double)samples, (double)steps);
        }
        weight[i] = a;
    }
}

/* The sums of a batch, from `scratch` or as they are given, as what `Chunk` has of it. */
TARGET static void STATE_NAME(take_batch)(const Forward *f, const Scratch *scratch, Chunk *k, int64_t begin,
                                          int64_t size) {
    if (f->stages & SUMS) {
        const double n = (double)(f->outer * f->inner);
        const double *pivot = scratch->pivot + begin, *first = scratch->first + begin;
        const double *second = scratch->second + begin;
        EACH {
            const double offset = first[i] / n, squares = second[i] - first[i] * offset;
            k->n[i] = n;
            k->batch_mean[i] = pivot[i] + offset;
            /* Rounding may leave a tiny negative difference for a constant channel; NaN stays. */
            k->squares[i] = squares < 0 ? 0 : squares;
            k->batch_var[i] = k->squares[i] / n;
        }
        if (!f->batch_shift) return;
        EACH {
            const double rest = k->batch_mean[i] - ROUNDED(k->batch_mean[i]);
            AT(f->batch_shift) = (REAL)k->batch_mean[i];
            AT(f->batch_sums) = (REAL)(n * rest);
            AT(f->batch_sqrs) = (REAL)(k->squares[i] + n * rest * rest);
            AT(f->batch_count) = (REAL)n;
        }
    } else if (f->batch_count) {
        EACH {
            const double n = (double)AT(f->batch_count), sums = (double)AT(f->batch_sums);
            const double offset = n > 0 ? sums / n : 0, squares = (double)AT(f->batch_sqrs) - sums * offset;
            k->n[i] = n;
            k->batch_mean[i] = (double)AT(f->batch_shift) + offset;
            k->squares[i] = squares < 0 ? 0 : squares;
            k->batch_var[i] = n > 0 ? k->squares[i] / n : 0;
        }
    } else { /* only the running statistics are asked for */
        EACH k->n[i] = k->batch_mean[i] = k->squares[i] = k->batch_var[i] = 0;
    }
}

/* See update._enter, and the view of the state in `running_mean` and `running_var`. */
TARGET INLINE void STATE_NAME(enter_as)(const Forward *f, const Chunk *k, int64_t begin, int64_t size, int whole,
                                        int by_state) {
    const double samples_of_batch = f->batch_samples, floor = f->variance_floor, warmup = f->warmup_samples;
    EACH {
        const double n = k->n[i], mean = k->batch_mean[i], squares = k->squares[i];
        const double old_shift = (double)AT(f->shift), old_sums = (double)AT(f->sums), old_sqrs = (double)AT(f->sqrs);
        const double old_count = (double)AT(f->count), old_count_sqrs = (double)AT(f->count_sqrs);
        const double old_debias = (double)AT(f->debias);
        /* Nothing may enter that is not finite, nor so far away that its square is not. */
        const double distance = mean - old_shift;
        const double weight = squares + n * distance * distance < MAXIMUM ? k->weight[i] : 0, keep = 1 - weight;
        const int enters = weight != 0;
        /* Elements per unit of weight: those of the batch where none were counted yet. */
        const double unit = largest(old_count, TINY) / largest(old_debias, TINY);
        const double new_unit = old_count_sqrs == 0 ? n : unit;
        const double kept = keep * (new_unit / unit), gain = whole ? weight * new_unit / n : weight;
        /* Both about the mean of their pivots. */
        const double total = kept * old_count + gain * n;
        const double shift = ROUNDED(old_shift + distance * (gain * n / largest(total, TINY)));
        const double d = shift - old_shift, e = shift - mean, moved = old_sums - old_count * d;
        const double sqrs = ROUNDED(kept * (old_sqrs - d * (old_sums + moved)) + gain * (squares + n * e * e));
        const double sums = ROUNDED(kept * moved - gain * n * e), count = ROUNDED(total);
        const double count_sqrs = ROUNDED(kept * kept * old_count_sqrs + gain * gain * n);
        const double samples = ROUNDED((double)AT(f->samples) + samples_of_batch);

        const double least = largest(count, TINY), offset = sums / least;
        double var = sqrs / least - offset * offset;
        var = var < 0 ? 0 : var;
        if (by_state) {
            const double floored = samples < warmup ? floor : 0;
            var = var < floored ? floored : var;
        } else {
            /* Bessel's correction for weighted elements, see state.unbiased. */
            var /= largest(1 - count_sqrs / (least * least), EPSILON);
        }
        AT(f->shift) = enters ? (REAL)shift : AT(f->shift);
        AT(f->sums) = enters ? (REAL)sums : AT(f->sums);
        AT(f->sqrs) = enters ? (REAL)sqrs : AT(f->sqrs);
        AT(f->count) = enters ? (REAL)count : AT(f->count);
        AT(f->count_sqrs) = enters ? (REAL)count_sqrs : AT(f->count_sqrs);
        AT(f->debias) = enters ? (REAL)(weight + keep * old_debias) : AT(f->debias);
        AT(f->samples) = enters ? (REAL)samples : AT(f->samples);
        AT(f->steps) = enters ? (REAL)((double)AT(f->steps) + 1) : AT(f->steps);
        AT(f->running_mean) = enters ? (REAL)(shift + offset) : AT(f->running_mean);
        AT(f->running_var) = enters ? (REAL)var : AT(f->running_var);
        AT(f->last_keep) = (REAL)keep;
        AT(f->last_gain) = (REAL)(enters ? gain : 0);
    }
}

TARGET static void STATE_NAME(enter)(const Forward *f, Chunk *k, int64_t begin, int64_t size) {
    STATE_NAME(batch_weights)(f, k->weight, begin, size);
    /* Four loops: neither is decided in one. */
    if (f->whole_batches)
        f->by_state ? STATE_NAME(enter_as)(f, k, begin, size, 1, 1) : STATE_NAME(enter_as)(f, k, begin, size, 1, 0);
    else
        f->by_state ? STATE_NAME(enter_as)(f, k, begin, size, 0, 1) : STATE_NAME(enter_as)(f, k, begin, size, 0, 0);
}

/* See law.measured_noise. */
TARGET static void STATE_NAME(measure_noise)(const Forward *f, const Chunk *k, int64_t begin, int64_t size) {
    const double samples = f->batch_samples, window = f->window;
    EACH {
        const int enters = AT(f->last_gain) != 0;
        const double difference = k->batch_mean[i] - (double)AT(f->last_mean), steps = (double)AT(f->noise_steps);
        const double variance = largest((double)AT(f->running_var), k->batch_var[i]);
        const double compared = 0.5 * difference * difference / largest(variance, TINY);
        const double observed = smallest(steps == 0 ? 1 : compared, 1) * samples, noise = (double)AT(f->noise);
        AT(f->noise) = enters ? (REAL)(noise + (observed - noise) / smallest(steps + 1, window)) : AT(f->noise);
        AT(f->noise_steps) = enters ? (REAL)(steps + 1) : AT(f->noise_steps);
        AT(f->last_mean) = enters ? (REAL)k->batch_mean[i] : AT(f->last_mean);
    }
}

/* What a batch is normalised by with running gradients, and what its backward is told: see law.noise_of_batch,
   law.limited and law.trust. */
TARGET INLINE void STATE_NAME(take_running_as)(const Forward *f, Chunk *k, int64_t begin, int64_t size, int limits) {
    const double samples = f->batch_samples, max_lag = f->max_lag, lag_noise = f->lag_noise;
    const double trust_noise = f->trust_noise;
    EACH {
        const int enters = AT(f->last_gain) != 0;
        const double batch_mean = k->batch_mean[i], batch_var = k->batch_var[i];
        const double noise = smallest((double)AT(f->noise) / samples, 1);
        const double trust = largest(1 - (double)AT(f->last_keep), 1 / (1 + trust_noise * noise));
        double mean = (double)AT(f->running_mean), var = (double)AT(f->running_var);
        if (limits) {
            const double d = max_lag * (1 + lag_noise * noise);
            const double wider = largest(var, batch_var / ((1 + d) * (1 + d))), reach = d * sqrt(wider);
            const double nearer = smallest(largest(mean, batch_mean - reach), batch_mean + reach);
            var = enters ? wider : var, mean = enters ? nearer : mean;
        }
        k->mean[i] = mean, k->var[i] = var;
        k->first[i] = enters ? trust : 0;
        /* From the mean as it is stored, which z is made with. */
        k->second[i] = enters ? batch_mean - ROUNDED(mean) : 0;
        k->third[i] = enters ? sqrt(batch_var) : 0;
    }
}

TARGET static void STATE_NAME(take_running)(const Forward *f, Chunk *k, int64_t begin, int64_t size) {
    if (f->max_lag <= DBL_MAX)
        STATE_NAME(take_running_as)(f, k, begin, size, 1);
    else
        STATE_NAME(take_running_as)(f, k, begin, size, 0);
    STORE(f->trust, k->first)
    STORE(f->offset, k->second)
    STORE(f->batch_std, k->third)
}

/* With an exact gradient. */
TARGET static void STATE_NAME(take_exact)(const Forward *f, Chunk *k, int64_t begin, int64_t size) {
    const double floor = ROUNDED(f->variance_floor), warmup = f->warmup_samples;
    EACH {
        k->mean[i] = (double)AT(f->running_mean), k->var[i] = (double)AT(f->running_var);
        k->first[i] = (double)AT(f->last_gain) / largest((double)AT(f->count), TINY);
        const double settled = (double)AT(f->samples) < warmup ? floor : -1;
        k->second[i] = k->var[i] <= settled ? 0 : k->first[i];
    }
    STORE(f->kappa_mean, k->first)
    STORE(f->kappa_var, k->second)
}

TARGET static void STATE_NAME(forward_chunk)(const Forward *f, const Scratch *scratch, int64_t begin, int64_t size) {
    Chunk chunk, *k = &chunk;
    const double eps = f->eps;
    if (f->stages & (SUMS | UPDATE)) {
        STATE_NAME(take_batch)(f, scratch, k, begin, size);
        if (f->stages & UPDATE && f->updates) STATE_NAME(enter)(f, k, begin, size);
        if (!(f->stages & UPDATE && f->by_state)) {
            EACH k->mean[i] = k->batch_mean[i], k->var[i] = k->batch_var[i];
        } else if (f->noise) {
            /* By what evaluation takes, also in a channel that keeps its state. */
            if (f->updates) STATE_NAME(measure_noise)(f, k, begin, size);
            STATE_NAME(take_running)(f, k, begin, size);
        } else {
            STATE_NAME(take_exact)(f, k, begin, size);
        }
        EACH k->third[i] = 1 / sqrt(ROUNDED(k->var[i]) + eps);
        STORE(f->mean, k->mean)
        STORE(f->var, k->var)
        STORE(f->rstd, k->third)
        EACH k->first[i] = k->mean[i] - ROUNDED(k->mean[i]);
    } else {
        EACH {
            k->mean[i] = (double)AT(f->mean), k->first[i] = 0;
            k->third[i] = 1 / sqrt((double)AT(f->var) + eps);
        }
    }
    if (!(f->stages & APPLY)) return;
    /* y = (x − centre)·slope + base, where `first` is what the centre was rounded by. */
    if (f->weight) {
        EACH k->third[i] *= (double)AT(f->weight);
    }
    EACH k->second[i] = -k->first[i] * k->third[i];
    if (f->bias) {
        EACH k->second[i] += (double)AT(f->bias);
    }
    for (int64_t r = 0; r < scratch->repeats; r++) {
        STORE((REAL *)scratch->centre + r * f->channels, k->mean)
        STORE((REAL *)scratch->slope + r * f->channels, k->third)
        STORE((REAL *)scratch->base + r * f->channels, k->second)
    }
}

TARGET static void STATE_NAME(finish_forward)(const Forward *f, const Scratch *scratch, int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; c += CHUNK)
        STATE_NAME(forward_chunk)(f, scratch, c, end - c < CHUNK ? end - c : CHUNK);
    if (f->stages & UPDATE && f->updates && begin == 0) *(int64_t *)f->num_batches_tracked += f->batch_samples > 0;
}
