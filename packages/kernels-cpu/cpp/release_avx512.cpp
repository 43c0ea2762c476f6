#define NAMESPACE avx512
#include "release.inc.hpp"
