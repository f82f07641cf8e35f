#include "../ops.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace retro {

bool limit_threads(int threads) {
#ifdef _OPENMP
  omp_set_num_threads(threads);
  return true;
#else
  (void)threads;
  return false;
#endif
}

}  // namespace retro
