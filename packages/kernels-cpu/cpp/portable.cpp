#define NAMESPACE portable
#include "noise.inc.hpp"
#include "release.inc.hpp"
#include "squares.inc.hpp"
