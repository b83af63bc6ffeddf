import sys
from dataclasses import replace
import studies
from studies.paper import __main__ as m
from studies.paper.presets import PRESETS
PRESETS["smoke"]=replace(PRESETS["cpu"],seeds=(0,))
if __name__=="__main__":
    sys.exit(m.main(["--preset","smoke","--work","/tmp/smoke/work","--out","/tmp/smoke/pages"]))
