// The kernels compiled for the compiler's default target.
#include <initializer_list>

#include "formats.h"
#include "kernels.h"
#include "pool.h"

#include "lanes_portable.h"
#include "vector_math.h"
#include "linear.h"
#include "rows.h"
#include "attention.h"
#include "latent.h"
#include "noise.h"

namespace quire {

const Kernels* portable_kernels() {
    static const Kernels table{kName, linear, norm, rotary_cache, attention, latent_cache, latent_attention, gated_activation, argmax, logsumexp, gumbel};
    return &table;
}

}  // namespace quire
