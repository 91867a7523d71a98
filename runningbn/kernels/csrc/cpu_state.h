/* Between the sums of a batch and the map over it: let the sums enter the state, and say what to normalise by.
   Included once for every instruction set and dtype of the statistics, REAL, with MAXIMUM and TINY of that dtype.

   The same equations in plain torch are `_update_batch`, `_update_exact`, `_update_running` and `_update_gradient` of
   ops/update.py, by the functions of ops/law.py and the rules of momentum.py. Here all is in double, and rounded where it
   is stored. */

#define AT(pointer) (((REAL *)(pointer))[c])
#define SET(pointer, value)                            \
    {                                                  \
        if (pointer) AT(pointer) = (REAL)(value);      \
    }

#ifndef RUNNINGBN_STATE
#define RUNNINGBN_STATE
static double largest(double a, double b) { return a > b ? a : b; }
static double smallest(double a, double b) { return a < b ? a : b; }
#endif

/* a per channel, see momentum.py. Channels mostly agree, so that one value is computed for many. */
TARGET static void STATE_NAME(batch_weights)(const Forward *f, double *weight, int64_t begin, int64_t end) {
    const double n = f->batch_samples;
    double samples = -1, steps = -1, a = 0;
    for (int64_t c = begin; c < end; c++) {
        if (f->rule == GIVEN) {
            weight[c] = (double)AT(f->batch_weight);
            continue;
        }
        if ((double)AT(f->samples) != samples || (double)AT(f->steps) != steps) {
            samples = (double)AT(f->samples), steps = (double)AT(f->steps);
            if (f->rule == CONSTANT) a = f->rule_first;
            if (f->rule == CUMULATIVE) a = 1 / (steps + 1);
            if (f->rule == SQUARE_ROOT) a = 1 - (1 - f->rule_first) / sqrt(largest(n - 1, 1));
            if (f->rule == HORIZON) {
                /* Of Horizon: samples, start, fraction. */
                const double horizon = largest(f->rule_third * samples, f->rule_second);
                a = -expm1(-n / smallest(horizon, f->rule_first));
            }
        }
        weight[c] = a;
    }
}

/* See law.measured_noise. */
TARGET static void STATE_NAME(measure_noise)(const Forward *f, int64_t c, double batch_mean, double variance) {
    const double difference = batch_mean - (double)AT(f->last_mean), steps = (double)AT(f->noise_steps);
    double observed = steps == 0 ? 1 : 0.5 * difference * difference / largest(variance, TINY);
    observed = smallest(observed, 1) * f->batch_samples;
    AT(f->noise) = (REAL)((double)AT(f->noise) + (observed - (double)AT(f->noise)) / smallest(steps + 1, f->window));
    AT(f->noise_steps) = (REAL)(steps + 1);
    AT(f->last_mean) = (REAL)batch_mean;
}

/* See law.bounded: what scales the running means `m0` and `m1`, of a batch whose means are `p0` and `p1`. A batch that
   is not finite is no reason to subtract anything. */
TARGET static double STATE_NAME(scale_of_means)(const Backward *b, int64_t c, double m0, double m1, double p0,
                                                double p1) {
    const double rstd = (double)AT(b->rstd), offset = (double)AT(b->offset) * rstd;
    const double spread = (double)AT(b->batch_std) * rstd;
    const double across = p1 - offset * p0, constant = m0 + offset * m1, slope = spread * m1;
    const int varies = spread > sqrt(EPSILON) * fabs(offset);
    if (sizeof(REAL) == sizeof(float)) {
        /* Squares of floats are far from the limits of doubles: mostly, neither a root nor a quotient is needed. */
        const double square = spread * spread, of_memory = constant * constant + slope * slope;
        const double of_batch = varies ? p0 * p0 * square + across * across : p0 * p0;
        if (!(of_batch <= MAXIMUM * MAXIMUM * (varies ? square : 1))) return 0;
        const double wanted = varies ? of_memory * square : of_memory;
        return wanted <= of_batch ? 1 : sqrt(of_batch / wanted);
    }
    const double along = varies ? across / largest(spread, TINY) : 0;
    const double of_batch = hypot(p0, along), of_memory = hypot(constant, slope);
    if (!(of_batch <= MAXIMUM)) return 0;
    return of_memory <= of_batch ? 1 : of_batch / largest(of_memory, TINY);
}

TARGET static void STATE_NAME(finish_forward)(const Forward *f, const Scratch *scratch, int64_t begin, int64_t end) {
    const int64_t repeats = scratch->repeats, channels = f->channels;
    const double elements = (double)(f->outer * f->inner);
    if (f->stages & UPDATE && f->updates) STATE_NAME(batch_weights)(f, scratch->weight, begin, end);
    for (int64_t c = begin; c < end; c++) {
        double mean, var, residual = 0;
        if (f->stages & (SUMS | UPDATE)) {
            /* The batch, about its own mean: n, mean, squares. */
            double n = elements, squares;
            if (f->stages & SUMS) {
                const double offset = scratch->first[c] / n;
                mean = scratch->pivot[c] + offset;
                squares = scratch->second[c] - scratch->first[c] * offset;
            } else if (f->batch_count) {
                n = (double)AT(f->batch_count);
                const double offset = n > 0 ? (double)AT(f->batch_sums) / n : 0;
                mean = (double)AT(f->batch_shift) + offset;
                squares = (double)AT(f->batch_sqrs) - (double)AT(f->batch_sums) * offset;
            } else {
                mean = squares = 0; /* only the running statistics are asked for */
            }
            /* Rounding may leave a tiny negative difference for a constant channel; NaN stays. */
            if (squares < 0) squares = 0;
            var = n > 0 ? squares / n : 0;
            if (f->stages & SUMS && f->batch_shift) {
                const REAL shift = (REAL)mean;
                const double rest = mean - (double)shift;
                AT(f->batch_shift) = shift;
                AT(f->batch_sums) = (REAL)(n * rest);
                AT(f->batch_sqrs) = (REAL)(squares + n * rest * rest);
                AT(f->batch_count) = (REAL)n;
            }
            if (f->stages & UPDATE) {
                if (f->updates) {
                    /* Nothing may enter that is not finite, nor so far away that its square is not. */
                    const double distance = mean - (double)AT(f->shift);
                    const int finite = squares + n * distance * distance < MAXIMUM;
                    const double weight = finite ? scratch->weight[c] : 0, keep = 1 - weight;
                    double gain = 0;
                    if (weight != 0) {
                        /* Elements per unit of weight: those of the batch where none were counted yet. */
                        const double count = (double)AT(f->count), count_sqrs = (double)AT(f->count_sqrs);
                        const double unit = largest(count, TINY) / largest((double)AT(f->debias), TINY);
                        const double new_unit = count_sqrs == 0 ? n : unit;
                        const double kept = keep * (new_unit / unit);
                        gain = f->whole_batches ? weight * new_unit / n : weight;
                        /* Both about the mean of their pivots. */
                        const double total = kept * count + gain * n, shift = (double)AT(f->shift);
                        const REAL pivot = (REAL)(shift + (mean - shift) * (gain * n / largest(total, TINY)));
                        const double d = (double)pivot - shift, e = (double)pivot - mean;
                        const double sums = (double)AT(f->sums), moved = sums - count * d;
                        AT(f->sqrs) = (REAL)(kept * ((double)AT(f->sqrs) - d * (sums + moved)) +
                                             gain * (squares + n * e * e));
                        AT(f->sums) = (REAL)(kept * moved - gain * n * e);
                        AT(f->shift) = pivot;
                        AT(f->count) = (REAL)total;
                        AT(f->count_sqrs) = (REAL)(kept * kept * count_sqrs + gain * gain * n);
                        AT(f->debias) = (REAL)(weight + keep * (double)AT(f->debias));
                        AT(f->samples) = (REAL)((double)AT(f->samples) + f->batch_samples);
                        AT(f->steps) = (REAL)((double)AT(f->steps) + 1);
                    }
                    AT(f->last_keep) = (REAL)keep;
                    AT(f->last_gain) = (REAL)gain;
                    if (weight != 0) {
                        const double count = largest((double)AT(f->count), TINY);
                        const double offset = (double)AT(f->sums) / count;
                        double of_state = (double)AT(f->sqrs) / count - offset * offset;
                        if (of_state < 0) of_state = 0;
                        if (f->by_state) {
                            if (of_state < f->variance_floor && (double)AT(f->samples) < f->warmup_samples)
                                of_state = f->variance_floor;
                        } else {
                            /* Bessel's correction for weighted elements, see state.unbiased. */
                            const double uncorrected = 1 - (double)AT(f->count_sqrs) / (count * count);
                            of_state /= largest(uncorrected, EPSILON);
                        }
                        AT(f->running_mean) = (REAL)((double)AT(f->shift) + offset);
                        AT(f->running_var) = (REAL)of_state;
                    }
                }
                if (f->by_state) {
                    /* By what evaluation takes, also in a channel that keeps its state. */
                    const double batch_mean = mean, batch_var = var;
                    const int ignored = AT(f->last_gain) == 0;
                    mean = (double)AT(f->running_mean), var = (double)AT(f->running_var);
                    if (f->noise) {
                        if (f->updates && !ignored) STATE_NAME(measure_noise)(f, c, batch_mean, largest(var, batch_var));
                        /* See law.noise_of_batch. */
                        const double noise = smallest((double)AT(f->noise) / f->batch_samples, 1);
                        /* See law.trust and law.limited. */
                        const double trust = largest(1 - (double)AT(f->last_keep), 1 / (1 + f->trust_noise * noise));
                        if (f->max_lag <= DBL_MAX && !ignored) {
                            const double d = f->max_lag * (1 + f->lag_noise * noise);
                            var = largest(var, batch_var / ((1 + d) * (1 + d)));
                            const double reach = d * sqrt(var);
                            mean = smallest(largest(mean, batch_mean - reach), batch_mean + reach);
                        }
                        SET(f->trust, ignored ? 0 : trust)
                        /* From the mean as it is stored, which z is made with. */
                        SET(f->offset, ignored ? 0 : batch_mean - (double)(REAL)mean)
                        SET(f->batch_std, ignored ? 0 : sqrt(batch_var))
                    } else {
                        const double kappa = (double)AT(f->last_gain) / largest((double)AT(f->count), TINY);
                        const int floored = var <= (double)(REAL)f->variance_floor &&
                                            (double)AT(f->samples) < f->warmup_samples;
                        SET(f->kappa_mean, kappa)
                        SET(f->kappa_var, floored ? 0 : kappa)
                    }
                }
            }
            residual = mean - (double)(REAL)mean;
            SET(f->mean, mean)
            SET(f->var, var)
            if (f->rstd) AT(f->rstd) = (REAL)(1 / sqrt((double)(REAL)var + f->eps));
        } else {
            mean = (double)AT(f->mean), var = (double)AT(f->var);
        }
        if (f->stages & APPLY) {
            const double rstd = 1 / sqrt((double)(REAL)var + f->eps);
            const double slope = f->weight ? rstd * (double)AT(f->weight) : rstd;
            const double base = (f->bias ? (double)AT(f->bias) : 0) - residual * slope;
            for (int64_t i = 0; i < repeats; i++) {
                ((REAL *)scratch->centre)[i * channels + c] = (REAL)mean;
                ((REAL *)scratch->slope)[i * channels + c] = (REAL)slope;
                ((REAL *)scratch->base)[i * channels + c] = (REAL)base;
            }
        }
    }
    if (f->stages & UPDATE && f->updates && begin == 0) *(int64_t *)f->num_batches_tracked += f->batch_samples > 0;
}

TARGET static void STATE_NAME(finish_backward)(const Backward *b, const Scratch *scratch, int64_t begin, int64_t end) {
    const int64_t repeats = scratch->repeats, channels = b->channels;
    const double elements = (double)(b->outer * b->inner);
    for (int64_t c = begin; c < end; c++) {
        double sum_dy = 0, sum_dy_xhat = 0, m0, m1;
        if (b->stages & SUMS) {
            sum_dy = scratch->first[c];
            sum_dy_xhat = scratch->second[c] * (double)AT(b->rstd);
            SET(b->batch_sum_dy, sum_dy)
            SET(b->batch_sum_dy_xhat, sum_dy_xhat)
        } else if (b->batch_sum_dy) {
            sum_dy = (double)AT(b->batch_sum_dy), sum_dy_xhat = (double)AT(b->batch_sum_dy_xhat);
        }
        if (b->stages & UPDATE) {
            const double n = b->pooled_count ? (double)AT(b->pooled_count) : elements;
            const double p0 = sum_dy / n, p1 = sum_dy_xhat / n, trust = (double)AT(b->trust);
            const int finite = fabs(sum_dy) <= MAXIMUM && fabs(sum_dy_xhat) <= MAXIMUM;
            if (finite) {
                const double keep = 1 - trust;
                AT(b->sum_dy) = (REAL)(keep * (double)AT(b->sum_dy) + trust * p0);
                AT(b->sum_dy_xhat) = (REAL)(keep * (double)AT(b->sum_dy_xhat) + trust * p1);
                AT(b->count_dy) = (REAL)(keep * (double)AT(b->count_dy) + trust);
            }
            const double count = largest((double)AT(b->count_dy), TINY);
            m0 = (double)AT(b->sum_dy) / count, m1 = (double)AT(b->sum_dy_xhat) / count;
            /* What the forward has ignored is normalised by constants, and no gradient flows through those. */
            const int counts = finite && trust != 0;
            const double scale = counts ? STATE_NAME(scale_of_means)(b, c, m0, m1, p0, p1) : 0;
            m0 *= scale, m1 *= scale;
            SET(b->m0, m0)
            SET(b->m1, m1)
        } else if (b->m0) {
            m0 = (double)AT(b->m0), m1 = (double)AT(b->m1);
        } else {
            /* Where kappa is 0, so is the term: a channel that was not finite has sums that are not either. */
            const double kappa_mean = b->kappa_mean ? (double)AT(b->kappa_mean) : 1 / elements;
            const double kappa_var = b->kappa_var ? (double)AT(b->kappa_var) : 1 / elements;
            m0 = kappa_mean == 0 ? 0 : kappa_mean * sum_dy;
            m1 = kappa_var == 0 ? 0 : kappa_var * sum_dy_xhat;
        }
        if (b->stages & APPLY) {
            const double rstd = (double)AT(b->rstd), scale = b->weight ? rstd * (double)AT(b->weight) : rstd;
            for (int64_t i = 0; i < repeats; i++) {
                ((REAL *)scratch->centre)[i * channels + c] = AT(b->mean);
                ((REAL *)scratch->scale)[i * channels + c] = (REAL)scale;
                ((REAL *)scratch->slope)[i * channels + c] = (REAL)(-scale * rstd * m1);
                ((REAL *)scratch->base)[i * channels + c] = (REAL)(-scale * m0);
            }
        }
    }
}

#undef AT
#undef SET
